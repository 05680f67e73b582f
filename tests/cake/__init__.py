"""The whole on a tiny model: modes, trouble, deadlines, closing, forks, layered finish, several requests at once."""
