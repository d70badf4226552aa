"""Where people touch hmad: REST, the node's life, the command line."""
