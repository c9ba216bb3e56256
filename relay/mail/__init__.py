"""WHAT a message is: pure values and their syntax. Imports nothing of the project but itself."""
