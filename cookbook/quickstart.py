"""Your own documents, a question, an answer with its citation, a refusal with its reason.

run: python cookbook/quickstart.py
"""

from gemma_rag import Category, Document, GemmaEmbeddings, GroundedAnswerer, KnowledgeBase, TwoStageRetriever

# The offline English model. With access to EmbeddingGemma: GemmaEmbeddings(), and nothing else changes.
embeddings = GemmaEmbeddings(model="minilm")

documents = [
    Document(
        id="vpn",
        title="Working from home over the VPN",
        text="Install the VPN client from the software centre. Sign in with your usual password and the code on your phone.",
        category="it",
    ),
    Document(
        id="printers",
        title="Printing in colour",
        text="Colour printers stand on floors 2 and 5. A colour page costs your department 8 cents.",
        category="it",
    ),
    Document(
        id="holidays",
        title="Annual leave",
        text="Everyone has 27 days of annual leave. Up to 5 unused days can be taken until the end of March.",
        category="leave",
    ),
]
categories = [Category(name="it", description="Computers and networks"), Category(name="leave", description="Time off work")]

knowledge_base = KnowledgeBase.from_documents(documents, embeddings, categories=categories)
answerer = GroundedAnswerer(TwoStageRetriever(knowledge_base))

for question in ("How many days of holiday do I get?", "What does a colour page cost?", "Who won the chess final?"):
    answer = answerer.answer(question)
    print(f"? {question}\n  {answer.text}  ({answer.outcome.value})")
    for citation in answer.citations:
        print(f"  [{citation.number}] {citation.title}, {citation.category}")
