"""The one schema: recipes, flags, help, errors and the resolved configuration all come from here."""
