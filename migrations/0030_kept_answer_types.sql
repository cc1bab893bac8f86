-- As what an answer was sent that is neither JSON nor events: its body is in base64 then.
ALTER TABLE kept_answers ADD COLUMN content_type TEXT;
