"""Many steps in one file: a recipe's plans, what of them is done already, and making a bundle again."""
