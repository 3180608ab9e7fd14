"""From a model and text to codecs and tables: statistics, samples, codebooks, plans."""
