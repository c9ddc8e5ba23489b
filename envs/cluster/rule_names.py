"""The names of the rules that are built into the cluster model; `rules` says what they do."""

# Index 0 leaves the kind to the agent, 1 is what the stock system does.
RULES: dict[str, tuple[str, ...]] = {
    "dispatch": (
        "agent", "least_request", "round_robin", "least_tokens", "lmetric", "least_work", "mooncake",
        "llumnix", "infaas",
    ),
    "preempt": ("agent", "engine", "last", "lowest_priority", "largest", "cheapest", "least_left"),
    "migrate": ("agent", "stay", "llumnix", "infaas", "greedy"),
    "move": ("agent", "default", "shortest"),
    "budget": ("agent", "keep", "fixed", "tpot"),
    "scale": ("agent",),
}  # fmt: skip
MODES = ("paper", "artifact")
PARAMS = 4
