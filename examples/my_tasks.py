"""A task of one's own, as docs/new-task.md explains it: PushCube, with a target that lies to one side.

python bc.py --env-id examples.my_tasks:PushAside-v1 --obs-mode state --num-demos 50
"""

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.examples.motionplanning.panda.motionplanner import PandaArmMotionPlanningSolver
from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose

from plumbing.tasks import TASKS, Task

NAME = "PushAside-v1"
ENV_ID = f"{__name__}:{NAME}"  # what --env-id says: the module's name, a colon, and the task's


# 1. The task: what a scene holds, where things start, and what success is. What isn't written here is PushCube's.
@register_env(NAME, max_episode_steps=50)  # ManiSkill's own limit; the one in part 3 is what counts here
class PushAside(PushCubeEnv):
    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        place = self.goal_region.pose.p[env_idx].clone()  # [n, 3] metres
        place[:, 1] += 0.16 * torch.rand(len(env_idx), device=place.device) - 0.08
        turned = self.goal_region.pose.q[env_idx]
        self.goal_region.set_pose(Pose.create_from_pq(place, turned))


# 2. How the motion planner does it, for demonstrations. A task without this needs --demo-path.
def solve(env, seed=None, debug=False, vis=False):
    env.reset(seed=seed)
    task = env.unwrapped
    planner = PandaArmMotionPlanningSolver(
        env,
        debug=debug,
        vis=vis,
        base_pose=task.agent.robot.pose,
        visualize_target_grasp_pose=vis,
        print_env_info=False,
    )
    cube = task.obj.pose.sp.p
    goal = task.goal_region.pose.sp.p
    way = (goal - cube) * [1, 1, 0]
    ahead = way / np.linalg.norm(way)
    hand = task.agent.tcp.pose.sp
    behind = cube - 0.07 * ahead
    beside = [behind[0] - 0.05, behind[1], behind[2]]
    planner.close_gripper()
    planner.move_to_pose_with_screw(sapien.Pose(beside, hand.q))
    planner.move_to_pose_with_screw(sapien.Pose(behind, hand.q))
    result = planner.move_to_pose_with_screw(sapien.Pose(goal * [1, 1, 0] + cube * [0, 0, 1] - 0.06 * ahead, hand.q))
    planner.close()
    return result


MP_SOLUTIONS[ENV_ID] = solve

# 3. What policies are told, the time limit in seconds, and where the camera is and where it looks, in metres.
TASKS[ENV_ID] = Task("push the cube onto the target at the side", 6.0, (0.5, 0.0, 0.5), (0.05, 0.0, 0.0))
