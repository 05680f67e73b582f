"""What measures is right: the bound, links, servers, pictures."""
