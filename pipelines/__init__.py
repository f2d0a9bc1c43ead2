"""What runs on Ray: refresh, embed, train, evaluate and sample, and what they share."""
