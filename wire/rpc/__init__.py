"""Multiplexed request/reply over TCP, on trio."""
