"""Rollouts, rewards, advantages and losses."""
