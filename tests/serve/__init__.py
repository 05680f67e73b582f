"""The server, by its clients: OpenAI's, LangChain's, curl, and a browser."""
