"""Profiles and the model that turns a batch into time."""

from servegym.envs.costs.profile import Profile, load_profile, profile_names, save_profile
from servegym.envs.costs.tables import CostTables, cost_tables

__all__ = ["CostTables", "Profile", "cost_tables", "load_profile", "profile_names", "save_profile"]
