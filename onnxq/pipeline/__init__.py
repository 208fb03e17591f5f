"""From a pipeline text to a checked output file: grammar, recipes, registry, runner, comparison."""
