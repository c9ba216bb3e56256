"""Mail going out: one lane for each next hop, its connections, and the attempts that run on them."""
