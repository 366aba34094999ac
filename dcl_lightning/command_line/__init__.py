"""Parts of the command line: its parser, what it says of mistakes, configuration files and run folders."""
