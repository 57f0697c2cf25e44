"""From what a person says to a spec: names, surrogates, pictures, settings by kind of base; all of it before anything
expensive.

Words come in, a checked ``Spec`` goes out (`prepare`, or `by_name` where there is a checkpoint and a name alone).
"""
