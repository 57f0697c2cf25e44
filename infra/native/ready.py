"""Wait for servers, at most three minutes: python infra/native/ready.py [URL ...] [--bucket NAME].

Without a URL it waits for MLflow and Prefect, as the environment names them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.error
import urllib.request

SECONDS = 180


def main() -> None:
    """Wait, then make the bucket."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="*")
    parser.add_argument("--bucket")
    given = parser.parse_args()
    urls = given.urls or [f"{os.environ['MLFLOW_TRACKING_URI']}/health", f"{os.environ['PREFECT_API_URL']}/health"]
    deadline = time.monotonic() + SECONDS
    for url in urls:
        while not answers(url):
            if time.monotonic() > deadline:
                sys.exit(f"{url} did not answer within {SECONDS} s.")
            time.sleep(0.5)
    if given.bucket:
        import boto3

        store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"], region_name="us-east-1")
        if given.bucket not in {one["Name"] for one in store.list_buckets()["Buckets"]}:
            store.create_bucket(Bucket=given.bucket)


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
