-- Run once, by the image's entry point, in an empty volume.
CREATE DATABASE mlflow;
CREATE DATABASE prefect;
