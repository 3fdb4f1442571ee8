"""Configuration: YAML to checked values, cards of models and chips, and the environment.

Import from the modules: `environment` (variables and folders), `model_card`, `chip_card`, `deployments` (mxn.yaml).
"""
