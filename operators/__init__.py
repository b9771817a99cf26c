"""Who may take over while a policy acts: ManiSkill's planner, or a person with a device. ConRFT calls them.

An operator is asked at each control step: operator(t, action [A] of the policy) -> action [A], or None to let the policy
act. start(seed) comes before each episode; `failed` counts, within it, how often there was no plan. A person who leaves
is devices.Gone.
"""
