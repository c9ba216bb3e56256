"""Who may send: mechanisms, stores, the throttle of guesses, and the two ends of the question "is this login right?"."""
