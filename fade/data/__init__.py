"""Pictures in, splits out: the built-in canvas, catalogs and forget / retain / holdout splits."""
