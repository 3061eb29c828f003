"""What every stage needs around its mathematics: files, folders, weights, tokenizers, tables."""
