"""Reinforcement learning of the policy."""
