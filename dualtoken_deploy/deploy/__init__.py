"""The deploy form: the eager model rewritten by exact algebra, rule by rule."""

from dualtoken_deploy.deploy.rewrite import RULES, DeployForm, Rule, deploy_form

__all__ = ["RULES", "DeployForm", "Rule", "deploy_form"]
