"""The five services and the command line. Services share messages, never imports."""
