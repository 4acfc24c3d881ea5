"""Factors, which gradients are made of, and contractions, which compute something from them."""
