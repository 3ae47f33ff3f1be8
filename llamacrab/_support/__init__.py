"""What every part may use: files, packages, the machine, versions."""
