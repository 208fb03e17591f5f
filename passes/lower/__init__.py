"""Passes that perform the plan: Q/DQ nodes, packed and integer operators."""
