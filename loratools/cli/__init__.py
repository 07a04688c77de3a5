"""The command line: parse, call one function, print. Nothing else knows click, rich or exit codes."""
