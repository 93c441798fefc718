"""Ways to carry out a study's runs, one file each: all do the same stages on the same folders."""
