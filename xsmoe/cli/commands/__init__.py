"""What the commands of `xsmoe` do; `xsmoe.cli` says what they take."""
