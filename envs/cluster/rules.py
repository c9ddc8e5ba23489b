"""Built-in rules by kind of question, as the contract names them."""

RULES = {
    "dispatch": (
        "agent", "least_request", "round_robin", "least_tokens", "lmetric", "least_work", "mooncake", "llumnix",
    ),
    "preempt": ("agent", "engine", "largest", "least_left", "cheapest", "lowest_priority"),
    "migrate": ("agent", "stay", "llumnix", "infaas"),
    "move": ("agent", "default", "shortest"),
    "budget": ("agent", "keep", "tpot"),
}  # fmt: skip
