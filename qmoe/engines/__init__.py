"""What other engines can run: their rules, and which tensor of a folder breaks which."""
