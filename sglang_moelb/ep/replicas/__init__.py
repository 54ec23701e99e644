"""The lever replicate: copies of hot experts on ranks with room, exact."""
