"""What workers share: exact budgets over all of them."""
