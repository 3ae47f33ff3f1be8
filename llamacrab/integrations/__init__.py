"""Other libraries' ways of calling llamacrab, each in a module of its own."""
