"""What is simulated: workloads, costs, the cluster model and its Gymnasium environments.

Importing this package registers the environments, so `gymnasium.make("ServeGym/Cluster-v0")` works after
`import servegym.envs`, and so does `gymnasium.make("servegym.envs:ServeGym/Cluster-v0")` alone. A deployed
policy needs the observation's schema and the profiles only, and runs where Gymnasium is not installed.
"""

try:
    import gymnasium
except ModuleNotFoundError:
    pass
else:
    for _name in ("Dispatch", "Preempt", "Migrate", "Budget", "Cluster"):
        gymnasium.register(
            id=f"ServeGym/{_name}-v0",
            entry_point=f"servegym.envs.cluster.env:{_name}Env",
            vector_entry_point=f"servegym.envs.cluster.vector:{_name}VectorEnv",
        )
