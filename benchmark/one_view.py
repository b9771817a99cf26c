"""ManiSkill's tasks under one camera pose, for benchmark/pretraining.py: `--env-id benchmark.one_view:StackCube-v1`.

In the scripts each task has a camera pose of its own. A backbone that learns several tasks should see one.
"""

from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

from plumbing.tasks import TASKS, Task

SEEN = {  # what the policy is told, and the time limit in seconds
    "PushCube-v1": ("push the cube onto the round target", 5.0),
    "PullCube-v1": ("pull the cube onto the round target", 5.0),
    "PickCube-v1": ("pick up the red cube and hold it at the goal position", 8.0),
    "PlaceSphere-v1": ("place the blue sphere into the bin", 10.0),
    "StackPyramid-v1": ("stack the blue cube on the red and the green cube", 20.0),
    "StackCube-v1": ("stack the red cube on the green cube", 10.0),
    "PullCubeTool-v1": ("pull the cube closer with the hook", 12.0),
    "PegInsertionSide-v1": ("insert the peg into the hole of the box", 20.0),
    "LiftPegUpright-v1": ("lift the peg upright", 10.0),
}
FLAGS = {  # what a task's demonstrations need (docs/tasks.md)
    "PullCubeTool-v1": dict(control_freq=20, max_episode_steps=300),
    "PegInsertionSide-v1": dict(control_mode="pd_ee_delta_pose"),
    "LiftPegUpright-v1": dict(control_mode="pd_ee_delta_pose"),
}
EYE = (0.46, 0.0, 0.48)  # metres: between the scripts' poses for pushing and for stacking
TARGET = (0.0, 0.0, 0.02)


def env_id(name: str) -> str:
    """What --env-id says."""
    return f"{__name__}:{name}"


for name, (instruction, seconds) in SEEN.items():
    TASKS[env_id(name)] = Task(instruction, seconds, EYE, TARGET)
    MP_SOLUTIONS[env_id(name)] = MP_SOLUTIONS[name]
