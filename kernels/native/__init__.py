"""Compiled CPU operations: built from one C file with the machine's own compiler, once per user. Knows no model."""
