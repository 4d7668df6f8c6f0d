"""The command line: one file for each group of verbs. torch is imported inside a verb, never at the top."""
