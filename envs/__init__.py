"""What is simulated: workloads, costs, the cluster model and its Gymnasium environments.

Importing this package registers the environments, so `gymnasium.make("ServeGym/Dispatch-v0")` works after
`import servegym.envs`, and so does `gymnasium.make("servegym.envs:ServeGym/Dispatch-v0")` alone.
"""

import gymnasium

gymnasium.register(
    id="ServeGym/Dispatch-v0",
    entry_point="servegym.envs.cluster.env:DispatchEnv",
    vector_entry_point="servegym.envs.cluster.vector:DispatchVectorEnv",
)
