"""Tasks that say how good a model is: their files, how they are scored, what comes out."""
