"""Problems that are built in. Each carries what is known about it in closed form."""
