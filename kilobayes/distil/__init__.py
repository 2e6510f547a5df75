"""From one base model to another without the task's data: inputs are made up, the old model labels them."""
