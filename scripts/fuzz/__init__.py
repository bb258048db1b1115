"""Damaged model folders by the thousand; run.py is the command."""
