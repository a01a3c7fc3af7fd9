"""What every part needs of the machine: packages that may be missing, files and directories of a run."""
