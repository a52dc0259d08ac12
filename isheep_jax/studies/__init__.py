"""Studies: the rows of the paper's tables and of this project's own, each run over several seeds and compared."""
