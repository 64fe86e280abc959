"""One's own documents, asked on the command line, on a page, or through a service that speaks OpenAI's protocol."""
