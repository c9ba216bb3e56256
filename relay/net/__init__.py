"""What the network needs that is not SMTP: TLS, later DNS."""
