"""`fastface bench`: build, warm up, measure."""
